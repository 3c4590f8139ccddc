"""The network: files to a loaded model, text to token ids, passages to states, prompts to margins."""
