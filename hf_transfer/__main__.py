"""``python -m hf_transfer``, which ``accelerate launch -m`` starts in every process."""

from hf_transfer.cli import main

if __name__ == "__main__":
    main()
