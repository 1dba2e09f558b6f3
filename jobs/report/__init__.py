"""One self-contained page that shows a dataset: what is there, what its rows look like, how they were made."""
