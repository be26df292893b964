"""Run controllers from files in sealed processes, so that foreign code reaches no file, no network and no secret.

Discovery and the proxy use it. The controller API (the modules above) never imports it.
"""
