"""What a person reads of a measurement: tables, figures, sheets of samples and HTML pages.

Figures are drawn from rows (`evaluation/results.py`) or arrays; nothing here runs a network.
"""
