"""`python -m bench report`: an HTML page and pictures of measured rows."""
