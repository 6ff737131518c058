/*-------------------------------------------------------------------------
 *
 * push.c
 *	  Statements of the pusher: claim, next, reap.
 *
 * A claim counts the attempt and is committed before anything is sent.  All run in a
 * transaction of the caller's.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/guc.h"
#include "base/spi_call.h"
#include "flow/push.h"

/*
 * The version that is sent is that of the task as this statement sees it, with
 * the body of the same row: if a newer one is wanted by then, the record finds
 * out.
 */
static RedriveSql claim_pushes = {
	.lookups = true,
	.text =
	"WITH due AS MATERIALIZED ("
	" SELECT d.push_id, d.task_id, w.probe, w.built, w.lease_until FROM ("
	"  SELECT z.*, $5 + p.lease AS lease_until FROM unnest($1, $2, $3, $4) AS z (platform_id, room, probe, built)"
	"  JOIN redrive.platforms AS p ON p.platform_id = z.platform_id) AS w"
	" CROSS JOIN LATERAL (SELECT x.push_id, x.task_id FROM redrive.pushes AS x"
	"  WHERE x.platform_id = w.platform_id AND NOT x.awaits_build AND x.state IN ('pending', 'waiting') AND x.next_attempt_at <= $5"
	"  ORDER BY x.next_attempt_at LIMIT w.room FOR UPDATE SKIP LOCKED) AS d),"
	" wanted AS MATERIALIZED (SELECT d.push_id, d.probe, d.lease_until, c.version, c.body FROM due AS d"
	"  CROSS JOIN LATERAL ("
	"   SELECT t.version, json_build_object('task_key', t.task_key, 'status', t.status, 'version', t.version, 'process', t.process,"
	"    'payload', t.payload, 'created_at', t.created_at, 'changed_at', t.changed_at)::text AS body"
	"   FROM redrive.tasks AS t WHERE NOT d.built AND t.task_id = d.task_id"
	"   UNION ALL SELECT b.version, b.body FROM redrive.push_bodies AS b WHERE d.built AND b.push_id = d.push_id) AS c)"
	" UPDATE redrive.pushes AS u SET state = 'in_flight', attempt_no = u.attempt_no + 1, lease_until = w.lease_until, lease_owner = $6,"
	"  sent_version = w.version, is_probe = w.probe"
	" FROM wanted AS w WHERE u.push_id = w.push_id"
	" RETURNING u.push_id, u.platform_id::int8 AS platform_id, u.attempt_no, u.sent_version, u.push_key::text || '-' || u.sent_version AS id, u.is_probe, w.body",
	.nargs = 6,.argtypes = {INT4ARRAYOID, INT4ARRAYOID, BOOLARRAYOID, BOOLARRAYOID, TIMESTAMPTZOID, INT8OID}
};

static RedriveSql next_push = {
	"SELECT n.at AS at, w.platform_id::int8 AS platform_id FROM unnest($1) AS w (platform_id)"
	" CROSS JOIN LATERAL (SELECT x.next_attempt_at AS at FROM redrive.pushes AS x WHERE x.platform_id = w.platform_id AND NOT x.awaits_build AND x.state IN ('pending', 'waiting')"
	" ORDER BY x.next_attempt_at LIMIT 1) AS n",
	1, {INT4ARRAYOID}
};

static RedriveSql reap_pushes = {
	"SELECT redrive._reap_pushes($1, $2) AS reaped",
	2, {TIMESTAMPTZOID, INT8OID}
};

/*
 * Claim what is due, at most room in all and what each platform has room for.
 *
 * Returns a list of Claimed in the current context, which has to outlive the
 * transaction; their pushes are in cxt.  The transaction has to be committed
 * before anything is sent.
 */
List *
redrive_claim_pushes(List *platforms, int room, int64 pusher, MemoryContext cxt)
{
	const TimestampTz now = GetCurrentTimestamp();
	MemoryContext result_cxt = CurrentMemoryContext;
	int			n_active = 0;
	int			http_share;
	int			n = 0;
	int			size = Max(list_length(platforms), 1);
	Datum	   *ids = palloc(size * sizeof(Datum));
	Datum	   *rooms = palloc(size * sizeof(Datum));
	Datum	   *probes = palloc(size * sizeof(Datum));
	Datum	   *built = palloc(size * sizeof(Datum));
	Datum		values[6];
	List	   *claimed = NIL;
	ListCell   *lc;
	uint64		rows;

	foreach(lc, platforms)
		if (!((Platform *) lfirst(lc))->paused)
		n_active++;
	http_share = redrive_push_max_in_flight / Max(n_active, 1);
	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		/* nobody gets so much that nothing is left for another */
		int			own = Min(redrive_room_of(p, Max(http_share, 1), now), room);

		p->asked = 0;
		if (own <= 0 || !p->more_due)
			continue;
		p->asked = own;
		ids[n] = Int32GetDatum(p->platform_id);
		rooms[n] = Int32GetDatum(own);
		probes[n] = BoolGetDatum(p->breaker == BREAKER_HALF_OPEN);
		built[n] = BoolGetDatum(p->has_build);
		room -= own;
		n++;
	}
	if (n == 0)
		return NIL;
	values[0] = redrive_array(INT4OID, n, ids, NULL);
	values[1] = redrive_array(INT4OID, n, rooms, NULL);
	values[2] = redrive_array(BOOLOID, n, probes, NULL);
	values[3] = redrive_array(BOOLOID, n, built, NULL);
	values[4] = TimestampTzGetDatum(now);
	values[5] = Int64GetDatum(pusher);
	rows = redrive_sql(&claim_pushes, values, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		Claimed    *c = MemoryContextAllocZero(result_cxt, sizeof(Claimed));
		Push	   *push = MemoryContextAllocZero(cxt, sizeof(Push));
		int32		platform_id = (int32) redrive_int64(row, "platform_id");
		MemoryContext old_cxt;

		foreach(lc, platforms)
			if (((Platform *) lfirst(lc))->platform_id == platform_id)
			push->platform = lfirst(lc);
		push->push_id = redrive_int64(row, "push_id");
		push->attempt_no = redrive_int64(row, "attempt_no");
		push->version = redrive_int64(row, "sent_version");
		push->is_probe = redrive_bool(row, "is_probe");
		push->started_at = now;
		push->config_version = push->platform->config_version;
		push->platform->asked--;
		c->push = push;
		c->id = redrive_text(row, "id", result_cxt);
		c->body = redrive_text(row, "body", result_cxt);
		old_cxt = MemoryContextSwitchTo(result_cxt);
		claimed = lappend(claimed, c);
		MemoryContextSwitchTo(old_cxt);
	}
	/* who gave less than was asked for has no more */
	foreach(lc, platforms)
		if (((Platform *) lfirst(lc))->asked > 0)
		((Platform *) lfirst(lc))->more_due = false;
	redrive_free_rows();
	return claimed;
}

static TimestampTz
time_of(int row, const char *name)
{
	bool		isnull;
	Datum		value = redrive_column(row, name, &isnull);

	return isnull ? 0 : DatumGetTimestampTz(value);
}

/* Something may have become due anywhere. */
void
redrive_look_at_all(List *platforms)
{
	ListCell   *lc;

	foreach(lc, platforms)
		((Platform *) lfirst(lc))->more_due = true;
}

/*
 * Return when to claim next, if nothing happens before; DT_NOEND = no time is
 * known.  claimed is what was just claimed and will be under way.
 */
TimestampTz
redrive_next_push(List *platforms, List *claimed)
{
	const TimestampTz now = GetCurrentTimestamp();
	TimestampTz next = DT_NOEND;
	Datum	   *ids = palloc(Max(list_length(platforms), 1) * sizeof(Datum));
	int			n = 0;
	ListCell   *lc;
	Datum		values[1];
	uint64		rows;

	foreach(lc, claimed)
		((Claimed *) lfirst(lc))->push->platform->in_flight++;
	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		p->ready_at = redrive_platform_ready_at(p, now);
		if (p->ready_at != DT_NOEND)
			ids[n++] = Int32GetDatum(p->platform_id);
	}
	foreach(lc, claimed)
		((Claimed *) lfirst(lc))->push->platform->in_flight--;
	if (n == 0)
		return DT_NOEND;
	values[0] = redrive_array(INT4OID, n, ids, NULL);
	rows = redrive_sql(&next_push, values, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		TimestampTz at = time_of(row, "at");
		int32		id = (int32) redrive_int64(row, "platform_id");

		foreach(lc, platforms)
		{
			Platform   *p = lfirst(lc);

			if (p->platform_id == id)
				next = Min(next, Max(at, p->ready_at));
		}
	}
	return next;
}

/*
 * End attempts of pushers that are gone; with pusher, all that are not its own.
 * Returns how many.
 */
int64
redrive_reap_pushes(int64 pusher)
{
	Datum		values[2];

	values[0] = TimestampTzGetDatum(GetCurrentTimestamp());
	values[1] = Int64GetDatum(pusher);
	redrive_sql_one_row(&reap_pushes, values, pusher != 0 ? NULL : " n");
	return redrive_int64(0, "reaped");
}
