"""The process that drives a job; submitting starts it, and so does the task of a worker."""

from gradstore.stages.jobs.driver import main

if __name__ == "__main__":
    main()
