"""What no notebook calls: executing the notebooks (`execute`), what is made of them (`pages`,
`pdf`, `handin`) and the benchmark (`bench`)."""
