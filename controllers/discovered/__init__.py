"""Controllers explorers found, a file each and its card beside it. They are foreign: they run sealed, here too."""
