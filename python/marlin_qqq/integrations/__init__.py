"""Plug-ins for other projects. Each module only translates between that project's words and ours."""
