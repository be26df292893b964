"""Dashboard under `/ui`: server-rendered pages over the proxy's own service, with sign-in, sessions and charts.

Imported by the app only. Imports the endpoints (`proxy.api`) and everything below them.
"""
