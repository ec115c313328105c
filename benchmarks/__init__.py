"""What two scales cost, measured side by side: ``make bench``, or ``python -m benchmarks --help``.

``figures`` holds the rows of the table, ``step`` one training step in a process of its own (its
memory is read from the operating system), ``literal`` the implementation to compare with. Two more
are commands of their own: ``benchmarks.processes`` and ``benchmarks.explorer``.
"""
