"""What a call is: its description and the checks of its arguments."""
