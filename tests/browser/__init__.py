"""Pages of the dashboard in a real browser, over a proxy with a scripted upstream."""
