"""`python -m kalm_rag`."""

from kalm_rag.cli import main

if __name__ == "__main__":
    main()
