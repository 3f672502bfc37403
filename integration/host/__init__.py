"""What is known and done of one transformer: its trunk and head, its calls, hooks and proof.

Nothing here knows of predictors or schedules; `integration/session.py` puts the two together.
"""
