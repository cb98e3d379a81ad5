"""The HTTP API: what an operator's browser and scripts ask, with access tokens (ADR 15). FastAPI and uvicorn."""
