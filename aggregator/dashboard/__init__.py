"""The dashboard: pages of `covey-aggregator api` in which an operator sees the study and acts on it (NiceGUI).

Served by the API's own process at /dashboard. It reads by the API's read models and acts by the API's own routes, with
the token that its user signed in with: roles, limits, outcomes and audit entries are those of the API.
"""
