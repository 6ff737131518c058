#!/bin/bash
# An external worker of pg_redrive as a shell script, with psql.
#
# Usage: worker.sh HANDLER; the database is that of PGHOST, PGPORT, PGUSER, PGDATABASE.  The work is do_item();
# the rest is the same for every worker.  Each item is settled alone, in a transaction with what was written for it:
# right for work that takes seconds, as the shell starts a psql for each.  SIGTERM: it ends after its item.
set -uo pipefail
handler=$1
stop=
trap 'stop=yes' TERM

# The work: the square of n, to be stored in the database.  Print it, or fail with a message.
do_item()
{
	[[ $1 =~ ^-?[0-9]{1,9}$ ]] || { echo 'n is not a number'; return 1; }	# of more digits the square would not fit
	echo $(($1 * $1))
}

# Settle an item that is bad: settle_bad OUTCOME CODE MESSAGE.
settle_bad()
{
	in_database -v outcome="$1" -v code="$2" -v message="$3" <<-'SQL'
		SELECT redrive.settle(:chunk, :token, ARRAY[(:item, :'outcome', :'message', :'code', NULL)]::redrive.outcome[]) \gset
	SQL
}

# Store a result and settle its item.  What the database refuses has the outcome that fits its error.
settle_good()
{
	in_database -v result="$1" <<-'SQL'
		BEGIN;
		SAVEPOINT item;
		\set ON_ERROR_STOP off
		INSERT INTO conformance.done (batch_id, item_no, attempt, result) VALUES (:batch, :item, :attempt, :result);
		\set failed :ERROR
		\set ON_ERROR_STOP on
		\if :failed
		ROLLBACK TO item;
		SELECT CASE WHEN :'LAST_ERROR_SQLSTATE' = 'RD001' THEN 'ignored' WHEN :'LAST_ERROR_SQLSTATE' ~ '^2[23]' THEN 'failed' ELSE 'retry' END AS outcome,
			:'LAST_ERROR_SQLSTATE' AS code, :'LAST_ERROR_MESSAGE' AS message \gset
		SELECT redrive.settle(:chunk, :token, ARRAY[(:item, :'outcome', :'message', :'code', NULL)]::redrive.outcome[]) \gset
		\else
		SELECT redrive.settle(:chunk, :token, ARRAY[(:item, 'ok', NULL, NULL, NULL)]::redrive.outcome[]) \gset
		\endif
		COMMIT;
	SQL
}

in_database()
{
	psql -XAtq -v ON_ERROR_STOP=1 -v chunk="$chunk" -v token="$token" -v batch="$batch" -v item="$item" -v attempt="$attempt" "$@"
}

while [ -z "$stop" ]; do
	claim=$(psql -XAtq -v ON_ERROR_STOP=1 -v handler="$handler" -F ' ' <<-'SQL'
		SELECT chunk_id, lease_token, batch_id, item_no, attempt, coalesce((payload->'n')::text, 'null')
		FROM redrive.claim(:'handler', max_items => 20, lease => '2 min', worker => 'worker.sh', wait => '5 s');
	SQL
	) || { sleep 1; continue; }
	[ -n "$claim" ] || continue
	while read -r chunk token batch item attempt n; do
		[ -z "$stop" ] || break
		if result=$(do_item "$n"); then
			settle_good "$result"
		else
			settle_bad failed E-INPUT "$result"
		# too late (RD004), or no server: nothing of this item is stored, and it may come again at once
		fi || { sleep 1; break; }
	done <<<"$claim"
	# ends the claim; what is left of it is given back
	read -r chunk token _ <<<"$claim"
	psql -XAtq -c "SELECT redrive.release($chunk, $token)" >/dev/null
done
