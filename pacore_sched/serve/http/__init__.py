"""The web application: routes, checks of every request, errors and logs."""
