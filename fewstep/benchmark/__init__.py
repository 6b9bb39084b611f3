"""Methods raced on one teacher: the file that says which, the race, and the page about its end."""
