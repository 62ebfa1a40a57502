"""Where a sweep's runs are started: on this machine (`local`), on a Ray cluster (`ray`), as SLURM jobs (`slurm`).

A launcher has

    here                how its runs are checked: they get this machine's devices
    at_once             the number of runs that it takes at a time
    retries             how often a run that was lost or stopped from outside is started again
    start(order) -> Job
    close()

and a job, which is one start of one run,

    queued              whether it waits for a machine
    wait(seconds)       its exit code, None if it has not ended by then
    stop(number)        passes a signal on; called by a signal handler
"""
