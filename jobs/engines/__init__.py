"""Engines hand tasks to workers: ``local`` in this process, ``ray`` on one machine or many."""
