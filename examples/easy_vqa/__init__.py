"""Teaching a small vision-language model easy-VQA with real weights, on a laptop."""
