"""`python -m sampo_ray`: the command line where no `sampo` is installed, as in a job on a cluster."""

from sampo_ray.console.main import main

if __name__ == "__main__":
    main()
