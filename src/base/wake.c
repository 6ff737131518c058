/*-------------------------------------------------------------------------
 *
 * wake.c
 *	  Wake-ups that take effect when the transaction commits.
 *
 * Who is to be woken is remembered per transaction and forgotten at its end,
 * whichever way it ends.  A wake-up sets a latch: of an idle executor of the
 * owner, else of the supervisor, which may start one.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "common/hashfn.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/timestamp.h"

#include "base/shmem.h"
#include "base/wake.h"

#define MAX_OWNERS 8

static bool callback_registered = false;
static Oid	owners[MAX_OWNERS];
static int64 hints[MAX_OWNERS]; /* batch of the first wake-up, 0 = none */
static int	n_owners = 0;		/* MAX_OWNERS + 1 = too many, wake everybody */
static bool several = false;	/* more than one wake-up of an owner */
static bool batch_ended = false;
static bool created = false;
static bool pusher = false;		/* something is to be pushed */
static bool supervisor = false; /* something becomes due that it has to wait
								 * for */
static TimestampTz supervisor_by = DT_NOEND;	/* the same, at a time */
static bool fold = false;		/* a chunk ended and nobody folds it */
static uint32 claimers = 0;		/* bits: groups of those who wait to claim */

PG_FUNCTION_INFO_V1(redrive__wake);
PG_FUNCTION_INFO_V1(redrive__wake_pusher);
PG_FUNCTION_INFO_V1(redrive__wake_supervisor);
PG_FUNCTION_INFO_V1(redrive__wake_supervisor_by);
PG_FUNCTION_INFO_V1(redrive__created);
PG_FUNCTION_INFO_V1(redrive__preloaded);

/* Wake the supervisor of this database if it would sleep longer than until "by". */
static void
wake_supervisor(TimestampTz by)
{
	RedriveDatabase *database;

	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	database = redrive_find_database(MyDatabaseId);
	if (database != NULL && database->latch != NULL && database->wakes_at > by)
		SetLatch(database->latch);
	LWLockRelease(redrive_shared->lock);
}

/* Wake the pusher, or the supervisor, which starts one. */
static void
wake_pusher(void)
{
	RedriveDatabase *database;

	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	database = redrive_find_database(MyDatabaseId);
	if (database != NULL && database->pusher_latch != NULL)
		SetLatch(database->pusher_latch);
	else if (database != NULL && database->latch != NULL)
		SetLatch(database->latch);
	LWLockRelease(redrive_shared->lock);
}

/*
 * Have the supervisor fold what has ended.  It leaves the wish standing for a
 * moment after it did, so that many of them wake it once.  Who clears the wish
 * has the lock alone, so it is set under a shared one.
 */
static void
want_fold(void)
{
	RedriveDatabase *database;

	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	database = redrive_find_database(MyDatabaseId);
	if (database != NULL && !database->fold_wanted)
	{
		database->fold_wanted = true;
		if (database->latch != NULL && database->folds_at == DT_NOEND)
			SetLatch(database->latch);
	}
	LWLockRelease(redrive_shared->lock);
}

/* Who waits to claim is grouped by this. */
static int
claimer_group(Oid owner)
{
	return hash_combine(murmurhash32(MyDatabaseId), murmurhash32(owner)) % REDRIVE_CLAIMER_GROUPS;
}

/* What those sleep on who wait for something of this owner to claim. */
RedriveClaimers *
redrive_claimers(Oid owner)
{
	return &redrive_shared->claimers[claimer_group(owner)];
}

static void
wake_claimers(uint32 groups)
{
	for (int i = 0; i < REDRIVE_CLAIMER_GROUPS; i++)
		if (groups & ((uint32) 1 << i))
		{
			pg_atomic_fetch_add_u64(&redrive_shared->claimers[i].woken, 1);
			ConditionVariableBroadcast(&redrive_shared->claimers[i].sleepers);
		}
}

/* Note that there is a prepared transaction whose commit has to wake somebody. */
static void
note_prepared(void)
{
	RedriveDatabase *database;

	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	database = redrive_find_database(MyDatabaseId);
	if (database != NULL)
		database->prepared = true;
	LWLockRelease(redrive_shared->lock);
}

static void
at_xact_end(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT)
	{
		if (n_owners > MAX_OWNERS)
			redrive_wake_now(InvalidOid, true, 0);
		else
			for (int i = 0; i < n_owners; i++)
				redrive_wake_now(owners[i], several, hints[i]);
		wake_claimers(claimers);
		if (supervisor)
			wake_supervisor(DT_NOBEGIN);
		else if (supervisor_by != DT_NOEND)
			wake_supervisor(supervisor_by);
		if (pusher)
			wake_pusher();
		if (fold)
			want_fold();
		if (batch_ended)
			ConditionVariableBroadcast(&redrive_shared->batch_ended);
		if (created)
			redrive_wake_launcher();
	}
	if (event == XACT_EVENT_PREPARE && (n_owners > 0 || claimers != 0 || supervisor || supervisor_by != DT_NOEND || pusher || fold || batch_ended))
		note_prepared();
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE)
	{
		n_owners = 0;
		several = false;
		batch_ended = false;
		created = false;
		supervisor = false;
		pusher = false;
		supervisor_by = DT_NOEND;
		fold = false;
		claimers = 0;
	}
}

static void
register_callback(void)
{
	if (!callback_registered)
		RegisterXactCallback(at_xact_end, NULL);
	callback_registered = true;
}

/*
 * Wake a worker of this owner in this database when the transaction commits, and
 * all who wait to claim something of his.
 *
 * batch_id, if not 0, is a batch that will be ready then: a hint that spares
 * the worker the search.
 */
void
redrive_wake_at_commit(Oid owner, int64 batch_id)
{
	if (redrive_shared == NULL)
		return;
	redrive_wake_claimers_at_commit(owner);
	for (int i = 0; i < Min(n_owners, MAX_OWNERS); i++)
		if (owners[i] == owner)
		{
			several = true;
			return;
		}
	if (n_owners < MAX_OWNERS)
	{
		owners[n_owners] = owner;
		hints[n_owners] = batch_id;
	}
	if (n_owners <= MAX_OWNERS)
		n_owners++;
}

/*
 * Wake an idle executor of this owner in this database, or all of them; the
 * supervisor when there was none or more may be wanted.
 *
 * owner InvalidOid = of whatever owner.  batch_id is as in
 * redrive_wake_at_commit.
 */
void
redrive_wake_now(Oid owner, bool all, int64 batch_id)
{
	bool		woken = false;

	if (redrive_shared == NULL)
		return;
	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	for (int i = 0; i < REDRIVE_MAX_SLOTS && (all || !woken); i++)
	{
		RedriveSlot *slot = &redrive_shared->slots[i];

		/* not a session: it may be about to end, and nobody would notice */
		if (slot->state == SLOT_IDLE && !slot->foreground && slot->database == MyDatabaseId &&
			(slot->owner == owner || !OidIsValid(owner)))
		{
			slot->state = SLOT_CLAIMING;	/* the next one wakes another */
			slot->hint = batch_id;
			batch_id = 0;
			SetLatch(slot->latch);
			woken = true;
		}
	}
	LWLockRelease(redrive_shared->lock);
	if (all || !woken)
		wake_supervisor(DT_NOBEGIN);
}

/*
 * A prepared transaction was committed.  Whom it wakes was forgotten when it was
 * prepared, maybe by another session: everybody of this database, if there ever
 * was one that wakes.
 */
void
redrive_wake_prepared(void)
{
	RedriveDatabase *database;
	bool		wakes;

	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	database = redrive_find_database(MyDatabaseId);
	wakes = database != NULL && database->prepared;
	LWLockRelease(redrive_shared->lock);
	if (!wakes)
		return;
	redrive_wake_now(InvalidOid, true, 0);
	wake_claimers(PG_UINT32_MAX);
	wake_pusher();
	want_fold();
	ConditionVariableBroadcast(&redrive_shared->batch_ended);
}

/* Let the supervisor see when the next work is due, after the commit. */
void
redrive_wake_supervisor_at_commit(void)
{
	if (redrive_shared == NULL)
		return;
	register_callback();
	supervisor = true;
}

/* The same if it would sleep longer than to this time. */
void
redrive_wake_supervisor_by(TimestampTz at)
{
	if (redrive_shared == NULL)
		return;
	register_callback();
	supervisor_by = Min(supervisor_by, at);
}

/* Have the chunks that ended folded after the commit. */
void
redrive_fold_at_commit(void)
{
	if (redrive_shared == NULL)
		return;
	register_callback();
	fold = true;
}

/* Wake all who wait to claim something of this owner when the transaction commits. */
void
redrive_wake_claimers_at_commit(Oid owner)
{
	if (redrive_shared == NULL)
		return;
	register_callback();
	claimers |= (uint32) 1 << claimer_group(owner);
}

/* Tell those who wait() when the transaction commits. */
void
redrive_batch_ended_at_commit(void)
{
	if (redrive_shared == NULL)
		return;
	register_callback();
	batch_ended = true;
}

/* Let the launcher look at this database again. */
void
redrive_wake_launcher(void)
{
	RedriveDatabase *database;

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	database = redrive_enter_database(MyDatabaseId, true);
	if (database != NULL)
	{
		database->probe = true;
		database->retry_at = 0;
		database->errors = 0;
	}
	if (redrive_shared->launcher_latch != NULL)
		SetLatch(redrive_shared->launcher_latch);
	LWLockRelease(redrive_shared->lock);
}

/* SQL: _wake(role) */
Datum
redrive__wake(PG_FUNCTION_ARGS)
{
	redrive_wake_at_commit(PG_GETARG_OID(0), 0);
	PG_RETURN_VOID();
}

/* Have the pusher look when this transaction commits. */
void
redrive_wake_pusher_at_commit(void)
{
	if (redrive_shared == NULL)
		return;
	register_callback();
	pusher = true;
}

/* SQL: _wake_pusher() */
Datum
redrive__wake_pusher(PG_FUNCTION_ARGS)
{
	redrive_wake_pusher_at_commit();
	PG_RETURN_VOID();
}

/* SQL: _wake_supervisor() */
Datum
redrive__wake_supervisor(PG_FUNCTION_ARGS)
{
	redrive_wake_supervisor_at_commit();
	PG_RETURN_VOID();
}

/* SQL: _wake_supervisor_by(at) */
Datum
redrive__wake_supervisor_by(PG_FUNCTION_ARGS)
{
	redrive_wake_supervisor_by(PG_GETARG_TIMESTAMPTZ(0));
	PG_RETURN_VOID();
}

/* SQL: _created(), the last statement of the install script */
Datum
redrive__created(PG_FUNCTION_ARGS)
{
	if (redrive_shared != NULL)
	{
		register_callback();
		created = true;
	}
	PG_RETURN_VOID();
}

/* SQL: _preloaded() */
Datum
redrive__preloaded(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(redrive_shared != NULL);
}
