"""Bundles of peer libraries for a machine without the internet: fetched, built, installed."""
