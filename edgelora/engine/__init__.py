"""The only room that imports llama_cpp: models, tokens, embeddings, log-likelihoods, text."""
