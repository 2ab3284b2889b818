"""One experiment for each system: ``python -m experiments`` lists them, ``python -m experiments.<name>`` runs one."""
