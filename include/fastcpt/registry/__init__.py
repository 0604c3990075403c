"""Which of a recipe's models is the one to serve: champion, candidates, and why."""
