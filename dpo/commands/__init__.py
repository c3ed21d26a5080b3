"""One function a command: from settings that are read to what is printed and written."""
