"""Which HTTP requests may go to an app: by the name in them and the site they come from. Pure."""
