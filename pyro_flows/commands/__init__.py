"""The commands of ``python -m pyro_flows``, one module each, and the modules that they share."""


class Refused(Exception):
    """Error for a wish that cannot be granted; its text is one line for the user of the command."""
