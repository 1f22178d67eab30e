"""How many labels an encoder saves: fine-tunings over arms, labelled budgets, draws and steps, and what they say together."""
