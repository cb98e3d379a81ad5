"""Models for wearables and phones, one file each with a function ``make_model``; `models.catalog` lists them."""
