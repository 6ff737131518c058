/*-------------------------------------------------------------------------
 *
 * supervisor.c
 *	  One process per database that starts executors and rescues orphans.
 *
 * Runs with the bootstrap identity and therefore never any code of users.
 * Sleeps until the next work is due; woken by commits, by executors that end,
 * and by a slow tick.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/procsignal.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/backoff.h"
#include "base/compat.h"
#include "base/guc.h"
#include "base/shmem.h"
#include "base/spi_call.h"
#include "base/xact.h"
#include "flow/claim.h"
#include "proc/external.h"
#include "proc/pusher.h"
#include "proc/supervisor.h"

#define TICK_MS 30000

/* An executor that ends within this time did not work; its role waits, longer each time. */
#define QUICK_END_US 1000000
#define PENALTY_US 1000000
#define PENALTY_MAX_US INT64CONST(60000000)

/* A shortage that comes back sooner than this is the same one. */
#define CLEARED_US INT64CONST(60000000)

/* An executor that this supervisor registered. */
typedef struct Started
{
	RedriveSlot *slot;
	uint32		generation;
	Oid			owner;
	TimestampTz started_at;
	BackgroundWorkerHandle *handle;
} Started;

/* A role that has work. */
typedef struct Candidate
{
	Oid			owner;
	char	   *name;
	char	   *trouble;		/* why it could not connect, or NULL */
} Candidate;

/* $3, those without a place, come first whatever their priority: what is freed for one, others would take. */
static RedriveSql list_owners = {
	.lookups = true,
	.text =
	"SELECT c.owner, c.owner::regrole::text AS name,"
	" CASE WHEN r.oid IS NULL THEN 'The role has been dropped.'"
	" WHEN $2 AND NOT r.rolcanlogin THEN 'The role may not log in.'"
	" WHEN NOT has_database_privilege(r.oid, current_database(), 'CONNECT') THEN 'The role may not connect to this database.'"
	" END AS trouble"
	" FROM (SELECT x.owner, max(x.priority) AS priority, min(x.due) AS due FROM redrive._candidates($1) AS x GROUP BY x.owner) AS c"
	" LEFT JOIN pg_roles AS r ON r.oid = c.owner"
	" ORDER BY array_position($3, c.owner::oid), c.priority DESC, c.due",
	.nargs = 3,.argtypes = {TIMESTAMPTZOID, BOOLOID, OIDARRAYOID}
};

static RedriveSql next_due = {
	"SELECT (extract(epoch FROM redrive._next_due($1) - $1) * 1000)::bigint AS ms",
	1, {TIMESTAMPTZOID}
};

static MemoryContext supervisor_cxt;	/* what outlives a turn of the loop */
static List *executors = NIL;	/* of Started */
static List *unable = NIL;		/* roles that could not connect; said so */
static Datum waiting[REDRIVE_MAX_SLOTS];	/* roles without a place */
static int	n_waiting = 0;
static RedriveDatabase *own_entry = NULL;	/* in shared memory, ours while we
											 * live */

static void
leave_shmem(int code, Datum arg)
{
	RedriveDatabase *entry;

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	entry = redrive_find_database(MyDatabaseId);
	if (entry != NULL && entry->pid == MyProcPid)
	{
		entry->pid = 0;
		entry->latch = NULL;
	}
	LWLockRelease(redrive_shared->lock);
}

/* Is the extension there?  If not, shared memory says so, and the database is left alone until it is created. */
static bool
extension_present(void)
{
	bool		present = OidIsValid(get_extension_oid("pg_redrive", true));
	RedriveDatabase *entry;

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	entry = redrive_find_database(MyDatabaseId);
	if (entry != NULL)
	{
		entry->present = present;
		entry->probe = present;
	}
	LWLockRelease(redrive_shared->lock);
	return present;
}

/* Is this role held back?  InvalidOid = is any. */
static bool
is_held_back(Oid owner, TimestampTz now)
{
	for (int i = 0; i < REDRIVE_MAX_HELD_BACK; i++)
		if (own_entry->held_back[i].until > now &&
			(own_entry->held_back[i].owner == owner || !OidIsValid(owner)))
			return true;
	return false;
}

/* Start no executor of this role for a while: longer each time in a row. */
static void
hold_back(Oid owner, TimestampTz now)
{
	RedriveHeldBack *place = &own_entry->held_back[0];

	/* the one that has waited longest makes room */
	for (int i = 1; i < REDRIVE_MAX_HELD_BACK && place->owner != owner; i++)
		if (own_entry->held_back[i].until < place->until || own_entry->held_back[i].owner == owner)
			place = &own_entry->held_back[i];
	if (place->owner != owner)
		place->times = 0;
	place->owner = owner;
	place->until = now + redrive_backoff(PENALTY_US, 2, PENALTY_MAX_US, place->times, owner);
	place->times++;
}

/* An executor of this role has worked. */
static void
do_not_hold_back(Oid owner)
{
	for (int i = 0; i < REDRIVE_MAX_HELD_BACK; i++)
		if (own_entry->held_back[i].owner == owner)
			memset(&own_entry->held_back[i], 0, sizeof(RedriveHeldBack));
}

/*
 * Notice executors that have ended: free slots of those that never came, and
 * hold back a role whose executors end at once.  Returns whether any ended.
 */
static bool
reap_executors(void)
{
	ListCell   *lc;
	bool		any = false;
	TimestampTz now = GetCurrentTimestamp();

	foreach(lc, executors)
	{
		Started    *started = lfirst(lc);
		pid_t		pid;

		if (GetBackgroundWorkerPid(started->handle, &pid) != BGWH_STOPPED)
			continue;
		any = true;
		if (started->slot->generation == started->generation && started->slot->state == SLOT_STARTING)
			redrive_slot_free(started->slot);
		if (started->slot->generation == started->generation && !started->slot->clean_exit &&
			now - started->started_at < QUICK_END_US)
		{
			if (!is_held_back(started->owner, now))
				hold_back(started->owner, now);
		}
		else
			do_not_hold_back(started->owner);
		executors = foreach_delete_current(executors, lc);
		pfree(started->handle);
		pfree(started);
	}
	return any;
}

/*
 * Register an executor; false when there is no slot, or no worker process:
 * then no_process is set.
 */
static bool
start_executor(Oid owner, bool *no_process)
{
	BackgroundWorker worker = {0};
	MemoryContext old_cxt;
	Started    *started;
	RedriveSlot *slot = redrive_slot_take(MyDatabaseId, owner, false);

	if (slot == NULL)
		return false;
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	worker.bgw_notify_pid = MyProcPid;
	worker.bgw_main_arg = Int32GetDatum((int32) (slot - redrive_shared->slots));
	memcpy(worker.bgw_extra, &slot->generation, sizeof(uint32));
	snprintf(worker.bgw_library_name, BGW_MAXLEN, "pg_redrive");
	snprintf(worker.bgw_function_name, BGW_MAXLEN, "redrive_executor_main");
	snprintf(worker.bgw_name, BGW_MAXLEN, "redrive executor");
	snprintf(worker.bgw_type, BGW_MAXLEN, "redrive executor");

	old_cxt = MemoryContextSwitchTo(supervisor_cxt);
	started = palloc(sizeof(Started));
	started->slot = slot;
	started->generation = slot->generation;
	started->owner = owner;
	started->started_at = GetCurrentTimestamp();
	if (!RegisterDynamicBackgroundWorker(&worker, &started->handle))
	{
		pfree(started);
		MemoryContextSwitchTo(old_cxt);
		redrive_slot_free(slot);
		*no_process = true;
		return false;
	}
	executors = lappend(executors, started);
	MemoryContextSwitchTo(old_cxt);
	return true;
}

/*
 * Count the executors of a role here that look for work or are coming; they
 * will find it.
 */
static int
count_available(Oid owner)
{
	int			count = 0;

	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	for (int i = 0; i < REDRIVE_MAX_SLOTS; i++)
	{
		RedriveSlot *slot = &redrive_shared->slots[i];

		if (slot->database == MyDatabaseId && slot->owner == owner && !slot->foreground &&
			(slot->state == SLOT_STARTING || slot->state == SLOT_CLAIMING || slot->state == SLOT_IDLE))
		{
			count++;
			if (slot->state == SLOT_IDLE)
			{
				slot->state = SLOT_CLAIMING;
				SetLatch(slot->latch);
			}
		}
	}
	LWLockRelease(redrive_shared->lock);
	return count;
}

/*
 * A role has work and there is no place for an executor: ask one of another
 * role to leave, an idle one if there is.  Only a role that has no executor at
 * all may push a working one of another role out.  Returns whether the role has
 * none.
 */
static bool
ask_for_place(Oid owner)
{
	RedriveSlot *victim = NULL;
	bool		has_one = false;
	bool		leaving = false;

	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	for (int i = 0; i < REDRIVE_MAX_SLOTS; i++)
	{
		RedriveSlot *slot = &redrive_shared->slots[i];

		if (slot->state == SLOT_FREE || slot->foreground)
			continue;
		if (slot->database == MyDatabaseId && slot->owner == owner)
			has_one = true;
		else if (slot->leave)
			leaving = true;
		else if (slot->latch != NULL && (victim == NULL || slot->state == SLOT_IDLE))
			victim = slot;
	}
	if (victim != NULL && (!has_one || victim->state == SLOT_IDLE) && !leaving)
	{
		victim->leave = true;
		SetLatch(victim->latch);
	}
	LWLockRelease(redrive_shared->lock);
	return !has_one;
}

/* Is there no use in starting an executor of this role?  We say so once, the server would each time. */
static bool
is_unable(Candidate *candidate)
{
	const bool	known = list_member_oid(unable, candidate->owner);
	MemoryContext old_cxt = MemoryContextSwitchTo(supervisor_cxt);

	if (candidate->trouble == NULL)
		unable = list_delete_oid(unable, candidate->owner);
	else if (!known)
		unable = lappend_oid(unable, candidate->owner);
	MemoryContextSwitchTo(old_cxt);
	if (candidate->trouble != NULL && !known)
		ereport(WARNING,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("pg_redrive has work of role \"%s\" but cannot start an executor for it", candidate->name),
				 errdetail("%s", candidate->trouble),
				 errhint("Work goes on when that has changed; redrive.doctor() tells what to do.")));
	return candidate->trouble != NULL;
}

/*
 * Start an executor for each role that has work and none looking for it.
 * Returns how long to sleep in ms.
 */
static long
dispatch(void)
{
	TimestampTz now = GetCurrentTimestamp();
	List	   *owners = NIL;
	ListCell   *lc;
	uint64		rows;
	bool		isnull;
	bool		no_process = false;
	int64		ms;
	bool		any_unable = false;
	Datum		values[3];
	static TimestampTz starved_at = 0;	/* last time seen */

	values[0] = TimestampTzGetDatum(now);
	values[1] = BoolGetDatum(REDRIVE_OWNER_NEEDS_LOGIN);
	values[2] = redrive_array(OIDOID, n_waiting, waiting, NULL);
	rows = redrive_sql(&list_owners, values, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		Candidate  *candidate = palloc(sizeof(Candidate));

		candidate->owner = DatumGetObjectId(redrive_column(row, "owner", &isnull));
		candidate->name = redrive_text(row, "name", CurrentMemoryContext);
		candidate->trouble = redrive_text(row, "trouble", CurrentMemoryContext);
		owners = lappend(owners, candidate);
	}
	n_waiting = 0;
	foreach(lc, owners)
	{
		Candidate  *candidate = lfirst(lc);
		Oid			owner = candidate->owner;

		if (is_held_back(owner, now) || count_available(owner) > 0)
			continue;
		if (is_unable(candidate))
			any_unable = true;
		else if (!start_executor(owner, &no_process) && ask_for_place(owner) && n_waiting < lengthof(waiting))
			waiting[n_waiting++] = ObjectIdGetDatum(owner);
	}
	/* once per condition: again only when it had cleared for a while */
	if (n_waiting > 0 && redrive_max_workers > 0 && now - starved_at > CLEARED_US)
		ereport(LOG,
				(errmsg("pg_redrive has work of a role but no free executor for it"),
				 errdetail("redrive.max_workers is %d, max_worker_processes %d.", redrive_max_workers, max_worker_processes),
				 errhint("Work goes on when an executor is free; increase the settings if this is frequent.")));
	if (n_waiting > 0)
		starved_at = now;
	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	own_entry->errors = 0;
	if (!no_process)
		own_entry->no_process_since = 0;
	else if (own_entry->no_process_since == 0)
		own_entry->no_process_since = now;
	LWLockRelease(redrive_shared->lock);

	redrive_sql_one_row(&next_due, values, NULL);
	ms = redrive_int64(0, "ms");
	(void) redrive_column(0, "ms", &isnull);
	if (isnull || ms > TICK_MS)
		ms = TICK_MS;
	if (n_waiting > 0 || no_process || any_unable || is_held_back(InvalidOid, now))
		ms = Min(ms, 1000);
	return (long) Max(ms + 1, 1);
}

/* Main function of a supervisor process; arg is the database. */
void
redrive_supervisor_main(Datum arg)
{
	RedriveDatabase *entry;
	bool		taken;
	bool		must_rescue = true;
	bool		woken = true;
	bool		fits = true;
	TimestampTz turn_at = 0;	/* the next whole turn, if nobody wakes us */
	TimestampTz rescued_at = 0;
	uint32		wait_event;

	redrive_take_signals(SignalHandlerForShutdownRequest);
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(arg), InvalidOid, 0);
	wait_event = redrive_wait_event("RedriveSupervisorMain");
	supervisor_cxt = AllocSetContextCreate(TopMemoryContext, "redrive supervisor", ALLOCSET_DEFAULT_SIZES);

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	entry = redrive_enter_database(MyDatabaseId, true);
	/* or a session needs the database to itself, since we were started */
	taken = entry == NULL || entry->pid != 0 || entry->kept_by != 0;
	if (!taken)
	{
		entry->pid = MyProcPid;
		entry->latch = MyLatch;
		own_entry = entry;
	}
	LWLockRelease(redrive_shared->lock);
	if (taken)
		proc_exit(0);
	before_shmem_exit(leave_shmem, 0);

	while (!ShutdownRequestPending)
	{
		bool		whole;		/* or only a fold */

		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
		}
		ResetLatch(MyLatch);
		whole = woken || GetCurrentTimestamp() >= turn_at;
		if (redrive_external_begin(own_entry))
			must_rescue = true;
		if (reap_executors())
			must_rescue = true;

		redrive_worker_begin();
		if (!extension_present())
		{
			redrive_worker_end();
			break;
		}
		fits = redrive_version_fits(fits ? WARNING : DEBUG1);
		if (!fits)
		{
			redrive_worker_end();
			must_rescue = true; /* and all the rest, then */
			(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, TICK_MS, wait_event);
			continue;
		}
		if (must_rescue || TimestampDifferenceExceeds(rescued_at, GetCurrentTimestamp(), TICK_MS))
		{
			pgstat_report_activity(STATE_RUNNING, "redrive: rescue");
			redrive_rescue();
			must_rescue = false;
			rescued_at = GetCurrentTimestamp();
			whole = true;
		}
		if (whole)
		{
			pgstat_report_activity(STATE_RUNNING, "redrive: start workers");
			turn_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), TICK_MS);
			if (redrive_enabled)
			{
				long		pusher_ms = redrive_start_pusher(own_entry, supervisor_cxt);
				long		sleep_ms = dispatch();

				if (pusher_ms > 0)
					sleep_ms = Min(sleep_ms, pusher_ms);
				turn_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), sleep_ms);
			}
		}
		redrive_external_fold(own_entry);
		if (whole)
			turn_at = redrive_external_look(turn_at);
		redrive_worker_end();

		woken = (WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, redrive_external_end(own_entry, turn_at), wait_event) & WL_LATCH_SET) != 0;
	}
	proc_exit(0);
}
