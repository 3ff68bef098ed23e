"""What a person sees and answers: console observer (rich), picker and chat (questionary)."""
