"""Deployment: an embedded model, a container image, Compose, a Helm chart, and settings of Prometheus and Grafana."""
