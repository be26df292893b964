"""The report of `make report`: figures and pictures measured on one machine, and the figures that miss their aim."""
