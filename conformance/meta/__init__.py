"""The tester tested: errors planted in each backend, every one of which the suite must find."""
