"""Bundled models of foreseer that its own wheel has no room for; `zoo:<name>` finds them here."""

__version__ = "0.2.0"
