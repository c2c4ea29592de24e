"""`tuner serve`: an HTTP service over the functions of the commands (`command.py` is the command, `app.py` the app)."""
