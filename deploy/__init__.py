"""Deployment: an embedded model to run the proxy with, and configuration of Prometheus and Grafana."""
