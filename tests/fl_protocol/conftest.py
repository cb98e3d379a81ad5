from hypothesis import settings

# Two shared cores: how long one example takes says nothing.
settings.register_profile("covey", deadline=None)
settings.load_profile("covey")
