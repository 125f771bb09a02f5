"""Bundles of peer libraries for machines without the internet: fetching, building, installing."""
