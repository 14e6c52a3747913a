"""The HTTP side: thin routes over the state; nothing is computed here."""
