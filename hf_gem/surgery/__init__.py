"""Everything that looks at a finished model or changes one."""
