# Read by the entry points in this folder.

# Put the password in a file into $password. End the program if there is none, or one that a URL or a password file would
# have to quote.
read_password() {
  password=$(cat "$1")
  case $password in
  "" | *[!A-Za-z0-9_-]*)
    echo "$1: it needs a password of letters, digits, - and _; write one with: openssl rand -hex 24" >&2
    exit 1
    ;;
  esac
}
