"""Does CFPO do what its paper says? A study of small policies, trained with this package.

``task.py`` is the task and the policy, ``train.py`` one run, ``grid.py`` which runs, written before
any of them was made, ``findings.py`` the tables, ``pictures.py`` the pictures, and ``__main__.py``
runs what is left on all cores.
"""
