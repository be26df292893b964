"""Never comes back from being loaded."""

while True:
    pass
