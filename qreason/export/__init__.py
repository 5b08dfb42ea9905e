"""Export: a merged model as GGUF files that were run in llama.cpp before they got their names."""
