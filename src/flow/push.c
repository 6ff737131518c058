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
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/guc.h"
#include "base/spi_call.h"
#include "flow/push.h"

/*
 * No push is changed or locked by a claim: what is claimed stands in push_claims, and
 * $7 are those that have been, so that they are not taken again.  The version that is sent is
 * that of the task as this statement sees it, with the body of the same row: if a newer
 * one is wanted by then, the record finds out.
 */
#define ASKED \
	"SELECT z.*, p.owner, p.config_version, $5 + p.lease AS lease_until" \
	" FROM unnest($1, $2, $3, $4, $9) WITH ORDINALITY AS z (platform_id, room, probe, built, owner_room, n)" \
	" JOIN redrive.platforms AS p ON p.platform_id = z.platform_id AND NOT p.paused"
#define DUE \
	" CROSS JOIN LATERAL (SELECT x.push_id, x.task_id, x.push_key, x.next_attempt_at FROM redrive.pushes AS x" \
	"  WHERE x.platform_id = w.platform_id AND NOT x.awaits_build AND x.state IN ('pending', 'waiting') AND x.next_attempt_at <= $5" \
	"  AND x.push_id NOT IN (SELECT unnest($7))" \
	"  ORDER BY x.next_attempt_at LIMIT w.room) AS d"
#define CLAIM(due) \
	"WITH due AS MATERIALIZED (" due " LIMIT $8)," \
	" wanted AS MATERIALIZED (SELECT d.push_id, d.push_key, d.platform_id, d.config_version, d.probe, d.lease_until, c.version, c.body FROM due AS d" \
	"  CROSS JOIN LATERAL (" \
	"   SELECT t.version, redrive._task_body(t.task_key, t.status, t.version, t.process, t.payload, t.created_at, t.changed_at) AS body" \
	"   FROM redrive.tasks AS t WHERE NOT d.built AND t.task_id = d.task_id" \
	"   UNION ALL SELECT b.version, b.body FROM redrive.push_bodies AS b WHERE d.built AND b.push_id = d.push_id) AS c)," \
	" claims AS (INSERT INTO redrive.push_claims (platform_id, pusher, is_probe, claimed_at, lease_until, push_ids, versions)" \
	"  SELECT w.platform_id, $6, w.probe, $5, w.lease_until, array_agg(w.push_id), array_agg(w.version)" \
	"  FROM wanted AS w GROUP BY w.platform_id, w.probe, w.lease_until RETURNING claim_id, platform_id)" \
	" SELECT w.platform_id::int8 AS platform_id, c.claim_id, w.push_id, w.version, w.probe, w.config_version, w.push_key::text || '-' || w.version AS id, w.body" \
	" FROM claims AS c JOIN wanted AS w ON w.platform_id = c.platform_id ORDER BY c.claim_id"
#define CLAIM_TYPES \
	.nargs = 9,.argtypes = {INT4ARRAYOID, INT4ARRAYOID, BOOLARRAYOID, BOOLARRAYOID, TIMESTAMPTZOID, INT8OID, INT8ARRAYOID, INT4OID, INT4ARRAYOID}

static RedriveSql claim_of_one_owner = {
	.lookups = true,
	.text = CLAIM("SELECT w.*, d.* FROM (" ASKED " ORDER BY z.n) AS w" DUE),
	CLAIM_TYPES
};

/* When there is not room for all, each owner gets one, then each a second one, and so on. */
static RedriveSql claim_of_owners = {
	.lookups = true,
	.text = CLAIM("SELECT o.* FROM ("
				  " SELECT w.*, d.*, row_number() OVER (PARTITION BY w.owner ORDER BY w.n, d.next_attempt_at) AS nth"
				  " FROM (" ASKED ") AS w" DUE ") AS o"
				  " WHERE o.nth <= o.owner_room ORDER BY o.nth, o.n"),
	CLAIM_TYPES
};

/* $2 are those that have been claimed. */
static RedriveSql next_push = {
	"SELECT n.at AS at, w.platform_id::int8 AS platform_id FROM unnest($1) AS w (platform_id)"
	" CROSS JOIN LATERAL (SELECT x.next_attempt_at AS at FROM redrive.pushes AS x WHERE x.platform_id = w.platform_id AND NOT x.awaits_build AND x.state IN ('pending', 'waiting')"
	" AND x.push_id NOT IN (SELECT unnest($2))"
	" ORDER BY x.next_attempt_at LIMIT 1) AS n",
	2, {INT4ARRAYOID, INT8ARRAYOID}
};

/* What would be claimed next cannot be. */
static RedriveSql block_next_push = {
	.lookups = true,
	.text =
	"UPDATE redrive.pushes AS u SET state = 'blocked', error_class = 'body', message = $3, failed_at = now()"
	" WHERE u.push_id = (SELECT x.push_id FROM redrive.pushes AS x"
	"  WHERE x.platform_id = $1 AND NOT x.awaits_build AND x.state IN ('pending', 'waiting') AND x.next_attempt_at <= now()"
	"  AND x.push_id NOT IN (SELECT unnest($2)) ORDER BY x.next_attempt_at LIMIT 1)",
	.nargs = 3,.argtypes = {INT4OID, INT8ARRAYOID, TEXTOID}
};

static RedriveSql reap_pushes = {
	"SELECT redrive._reap_pushes($1, $2)",
	2, {TIMESTAMPTZOID, INT8OID}
};

/* What pushers that are gone had claimed, and $1 has not ended. */
static RedriveSql unreaped_pushes = {
	"SELECT f.push_id FROM redrive._in_flight AS f WHERE f.pusher <> $1",
	1, {INT8OID}
};

static int64 *unreaped = NULL;
static int	n_unreaped = 0;

/*
 * Return an array of what these platforms have under way, and of what was just claimed;
 * and of what others have left under way.
 */
static Datum
under_way(Platform **platforms, int n, List *claimed)
{
	int			size = list_length(claimed) + n_unreaped;
	Datum	   *ids;
	int			n_ids = 0;
	dlist_iter	iter;
	ListCell   *lc;

	for (int i = 0; i < n; i++)
		size += platforms[i]->n_claimed;
	ids = palloc(Max(size, 1) * sizeof(Datum));
	for (int i = 0; i < n; i++)
		dlist_foreach(iter, &platforms[i]->claimed)
	{
		Push	   *push = dlist_container(Push, node, iter.cur);

		/* what this transaction has recorded may be due again */
		if (!push->recorded)
			ids[n_ids++] = Int64GetDatum(push->push_id);
	}
	foreach(lc, claimed)
		ids[n_ids++] = Int64GetDatum(((Push *) lfirst(lc))->push_id);
	for (int i = 0; i < n_unreaped; i++)
		ids[n_ids++] = Int64GetDatum(unreaped[i]);
	return redrive_array(INT8OID, n_ids, ids, NULL);
}

/*
 * Return how much of room may be taken by who has own already.
 *
 * He has at most seven times what he leaves to others then: one alone gets seven eighths
 * of all, n who want more than that 7 / (7n + 1) each, and how many they are need not be
 * known.  Who has nothing may take the last.
 */
static int
fair_room(int own, int room)
{
	const int	least = own == 0 && room > 0 ? 1 : 0;

	return Max((7 * room - own) / 8, least);
}

/*
 * Share out what may be under way among the owners, and of each among its platforms.
 *
 * Returns how many more there may be in all.
 */
int
redrive_share_out(List *platforms)
{
	int			room = redrive_push_max_in_flight;
	ListCell   *lc;

	foreach(lc, platforms)
		((Platform *) lfirst(lc))->owner->in_flight = 0;
	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		p->owner->in_flight += p->in_flight;
		room -= p->in_flight;
	}
	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		p->owner->room = fair_room(p->owner->in_flight, room);
		p->share = p->in_flight + fair_room(p->in_flight, p->owner->room);
	}
	return room;
}

/*
 * Claim what is due, at most room in all and what each owner and platform has room for, and
 * more for platforms that are quick; if alone is not NULL, for that platform only.
 *
 * Returns a list of Push in the current context, which has to outlive the
 * transaction.  It has to be committed before anything is sent, and then the list
 * is for redrive_keep_claimed().  Sets outdated if a platform has changed since it was
 * loaded: what was claimed may have been recorded together with that.
 */
List *
redrive_claim_pushes(List *platforms, Platform *alone, int room, int64 pusher, bool *outdated)
{
	static int	first = 0;
	const TimestampTz now = GetCurrentTimestamp();
	MemoryContext result_cxt = CurrentMemoryContext;
	int			n = 0;
	int			size = Max(list_length(platforms), 1);
	Datum	   *ids = palloc(size * sizeof(Datum));
	Datum	   *rooms = palloc(size * sizeof(Datum));
	Datum	   *owner_rooms = palloc(size * sizeof(Datum));
	Datum	   *probes = palloc(size * sizeof(Datum));
	Datum	   *built = palloc(size * sizeof(Datum));
	Platform  **asked = palloc(size * sizeof(Platform *));
	bool		one_owner = true;
	Datum		values[9];
	PushClaim  *claim = NULL;
	List	   *claimed = NIL;
	ListCell   *lc;
	uint64		rows;

	*outdated = false;
	redrive_share_out(platforms);
	for (int i = 0; i < list_length(platforms); i++)
	{
		/* each time another comes first: there may not be room for all */
		Platform   *p = list_nth(platforms, (i + first) % list_length(platforms));
		int			own;

		own = redrive_room_of(p, now);
		p->asked = 0;
		if (own <= 0 || !p->more_due || (alone != NULL && p != alone))
			continue;
		if (alone == NULL)
		{
			/* takes no room of others: it is sent when something has ended */
			const int	prefetch = Max(redrive_prefetch_of(p, now) - p->n_prefetched, 0);

			p->owner->room += prefetch;
			room += prefetch;
		}
		p->asked = own;
		ids[n] = Int32GetDatum(p->platform_id);
		rooms[n] = Int32GetDatum(own);
		probes[n] = BoolGetDatum(p->breaker == BREAKER_HALF_OPEN);
		built[n] = BoolGetDatum(p->has_build);
		asked[n] = p;
		one_owner &= p->owner == asked[0]->owner;
		n++;
	}
	if (n == 0)
		return NIL;
	first = (first + 1) % list_length(platforms);
	for (int i = 0; i < n; i++)
		owner_rooms[i] = Int32GetDatum(asked[i]->owner->room);
	values[0] = redrive_array(INT4OID, n, ids, NULL);
	values[1] = redrive_array(INT4OID, n, rooms, NULL);
	values[2] = redrive_array(BOOLOID, n, probes, NULL);
	values[3] = redrive_array(BOOLOID, n, built, NULL);
	values[4] = TimestampTzGetDatum(now);
	values[5] = Int64GetDatum(pusher);
	values[6] = under_way(asked, n, NIL);
	values[7] = Int32GetDatum(one_owner ? Min(room, asked[0]->owner->room) : room);
	values[8] = redrive_array(INT4OID, n, owner_rooms, NULL);
	/* a large body that was built is stored out of line */
	PushActiveSnapshot(GetTransactionSnapshot());
	rows = redrive_sql(one_owner ? &claim_of_one_owner : &claim_of_owners, values, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		Push	   *push = MemoryContextAllocZero(result_cxt, sizeof(Push));
		int32		platform_id = (int32) redrive_int64(row, "platform_id");
		int64		claim_id = redrive_int64(row, "claim_id");
		MemoryContext old_cxt;

		foreach(lc, platforms)
			if (((Platform *) lfirst(lc))->platform_id == platform_id)
			push->platform = lfirst(lc);
		/* the rows of a claim follow one another */
		if (claim == NULL || claim->claim_id != claim_id)
		{
			claim = MemoryContextAllocZero(result_cxt, sizeof(PushClaim));
			claim->claim_id = claim_id;
		}
		claim->left++;
		push->claim = claim;
		push->push_id = redrive_int64(row, "push_id");
		push->version = redrive_int64(row, "version");
		push->is_probe = redrive_bool(row, "probe");
		push->started_at = now;
		push->config_version = redrive_int64(row, "config_version");
		*outdated |= push->config_version != push->platform->config_version;
		push->platform->asked--;
		push->platform->owner->room--;
		push->id = redrive_text(row, "id", result_cxt);
		push->body = redrive_text(row, "body", result_cxt);
		/* what is sent is JSON, which is UTF-8 */
		if (push->body != NULL)
		{
			push->body = pg_server_to_any(push->body, strlen(push->body), PG_UTF8);
			push->platform->body_size += ((int) strlen(push->body) - push->platform->body_size) / 8;
		}
		old_cxt = MemoryContextSwitchTo(result_cxt);
		claimed = lappend(claimed, push);
		MemoryContextSwitchTo(old_cxt);
	}
	/* who gave less than was asked for has no more, if there was room for all */
	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		if (p->asked > 0 && p->owner->room > 0 && rows < room)
			p->more_due = false;
	}
	redrive_free_rows();
	PopActiveSnapshot();
	return claimed;
}

/*
 * Block what a claim for this platform would begin with, since it cannot be claimed: a
 * body that cannot be made, for example.  Returns whether there was one.
 */
bool
redrive_block_next_push(Platform *platform, const char *message)
{
	Datum		values[3];

	values[0] = Int32GetDatum(platform->platform_id);
	values[1] = under_way(&platform, 1, NIL);
	values[2] = CStringGetTextDatum(message);
	return redrive_sql(&block_next_push, values, NULL) > 0;
}

/* What was claimed is committed: keep it in cxt until it is recorded. */
void
redrive_keep_claimed(List *claimed, MemoryContext cxt)
{
	MemoryContext old_cxt = MemoryContextSwitchTo(cxt);
	PushClaim  *from = NULL;
	PushClaim  *claim = NULL;
	ListCell   *lc;

	foreach(lc, claimed)
	{
		Push	   *push = palloc(sizeof(Push));

		*push = *(Push *) lfirst(lc);
		if (push->claim != from)
		{
			from = push->claim;
			claim = palloc(sizeof(PushClaim));
			*claim = *from;
		}
		push->claim = claim;
		lfirst(lc) = push;
		dlist_push_tail(&push->platform->claimed, &push->node);
		push->platform->n_claimed++;
	}
	MemoryContextSwitchTo(old_cxt);
}

/* Forget pushes that have been recorded, with the last one of a claim that too. */
void
redrive_forget_pushes(Push **pushes, int n)
{
	for (int i = 0; i < n; i++)
	{
		Push	   *push = pushes[i];

		if (--push->claim->left == 0)
			pfree(push->claim);
		dlist_delete(&push->node);
		push->platform->n_claimed--;
		if (push->texts != NULL)
			MemoryContextDelete(push->texts);
		pfree(push);
	}
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
	const int	size = Max(list_length(platforms), 1);
	Datum	   *ids = palloc(size * sizeof(Datum));
	Platform  **ready = palloc(size * sizeof(Platform *));
	Platform  **sent = palloc(Max(list_length(claimed), 1) * sizeof(Platform *));
	int			n_sent = 0;
	int			room;
	int			n = 0;
	ListCell   *lc;
	Datum		values[2];
	uint64		rows;

	/* what there is no room for is prefetched, and not under way yet */
	room = redrive_share_out(platforms);
	foreach(lc, claimed)
	{
		Platform   *p = ((Push *) lfirst(lc))->platform;

		if (room <= 0 || p->owner->room <= 0 || p->in_flight >= redrive_most_at_once(p))
			continue;
		sent[n_sent++] = p;
		p->in_flight++;
		p->owner->room--;
		room--;
	}
	redrive_share_out(platforms);
	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		p->ready_at = redrive_platform_ready_at(p, now);
		if (p->ready_at == DT_NOEND)
			continue;
		ids[n] = Int32GetDatum(p->platform_id);
		ready[n++] = p;
	}
	while (n_sent > 0)
		sent[--n_sent]->in_flight--;
	if (n == 0)
		return DT_NOEND;
	values[0] = redrive_array(INT4OID, n, ids, NULL);
	values[1] = under_way(ready, n, claimed);
	rows = redrive_sql(&next_push, values, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		TimestampTz at = redrive_time(row, "at");
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
 * End attempts of pushers that are gone, those of all others than this one.
 *
 * Returns whether some are left, because somebody has locked their pushes.  These are not
 * claimed before this has ended them: they would be sent once more than is counted.
 */
bool
redrive_reap_pushes(int64 pusher)
{
	Datum		values[2];
	int			n;

	values[0] = TimestampTzGetDatum(GetCurrentTimestamp());
	values[1] = Int64GetDatum(pusher);
	redrive_sql_one_row(&reap_pushes, values, NULL);
	n = (int) redrive_sql(&unreaped_pushes, &values[1], NULL);
	n_unreaped = 0;				/* until there is room for them */
	if (unreaped != NULL)
		pfree(unreaped);
	unreaped = NULL;
	if (n > 0)
		unreaped = MemoryContextAlloc(TopMemoryContext, n * sizeof(int64));
	for (int row = 0; row < n; row++)
		unreaped[row] = redrive_int64(row, "push_id");
	n_unreaped = n;
	return n_unreaped > 0;
}
