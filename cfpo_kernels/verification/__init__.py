"""The kernels checked on the machine where they run, and what "auto" makes of it.

=============  ====================================================================================
``run``        the public function ``verify``: what to check here, the record, the exit status
``process``    the child process in which it happens: started, watched, ended
``child``      that process's program
``battery``    what a set of kernels has to pass on a device: ``cases``, ``calls``, ``compare``
``timing``     how fast the right ones are, beside a copy
``records``    what was found, on disk
``choice``     what ``backend="auto"`` takes
``report``     tables, lines and ``python -m cfpo_kernels info``
=============  ====================================================================================

Data flows downwards: choice -> run -> process -> (child -> battery, timing) -> records.
"""
