/*-------------------------------------------------------------------------
 *
 * pusher_start.c
 *	  How the supervisor starts the pusher, and how it becomes known.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/backoff.h"
#include "base/spi_call.h"
#include "proc/pusher.h"

/* A pusher that ends within this time did not work. */
#define QUICK_END_US 1000000

/* Is there anything to push to? */
static RedriveSql has_platforms = {
	"SELECT EXISTS (SELECT FROM redrive.platforms) AS has_platforms",
	0, {0}
};

/*
 * Start the pusher when there are platforms and it is not there; for the
 * supervisor, in a transaction.
 *
 * One that ends soon is started again later each time.  Returns how long until
 * that in ms, 0 when there is nothing to wait for.  cxt outlives the supervisor's
 * transactions.
 */
long
redrive_start_pusher(RedriveDatabase *entry, MemoryContext cxt)
{
	static BackgroundWorkerHandle *handle = NULL;
	static TimestampTz started_at = 0;
	static TimestampTz not_before = 0;
	static int	quick_ends = 0;
	TimestampTz now = GetCurrentTimestamp();
	BackgroundWorker worker = {0};
	MemoryContext old_cxt;
	pid_t		pid;
	bool		wanted;

	redrive_sql_one_row(&has_platforms, NULL, NULL);
	wanted = redrive_bool(0, "has_platforms");
	if (handle != NULL)
	{
		if (GetBackgroundWorkerPid(handle, &pid) != BGWH_STOPPED)
			return 0;
		pfree(handle);
		handle = NULL;
		quick_ends = wanted && now - started_at < QUICK_END_US ? quick_ends + 1 : 0;
		not_before = quick_ends == 0 ? 0 : now + redrive_backoff(QUICK_END_US, 2, INT64CONST(60000000), quick_ends - 1, MyDatabaseId);
	}
	if (!wanted || entry->pusher_pid != 0)
		return 0;
	if (now < not_before)
		return TimestampDifferenceMilliseconds(now, not_before) + 1;
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	worker.bgw_notify_pid = MyProcPid;
	worker.bgw_main_arg = ObjectIdGetDatum(MyDatabaseId);
	snprintf(worker.bgw_library_name, BGW_MAXLEN, "pg_redrive");
	snprintf(worker.bgw_function_name, BGW_MAXLEN, "redrive_pusher_main");
	snprintf(worker.bgw_name, BGW_MAXLEN, "redrive pusher");
	snprintf(worker.bgw_type, BGW_MAXLEN, "redrive pusher");
	old_cxt = MemoryContextSwitchTo(cxt);
	if (!RegisterDynamicBackgroundWorker(&worker, &handle))
		handle = NULL;			/* doctor() tells of the shortage */
	MemoryContextSwitchTo(old_cxt);
	started_at = now;
	return handle == NULL ? 1000 : 0;
}

static void
leave_shmem(int code, Datum arg)
{
	RedriveDatabase *entry;

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	entry = redrive_find_database(MyDatabaseId);
	if (entry != NULL && entry->pusher_pid == MyProcPid)
	{
		entry->pusher_pid = 0;
		entry->pusher_latch = NULL;
		/* the supervisor starts another, if one is needed */
		if (entry->latch != NULL)
			SetLatch(entry->latch);
	}
	LWLockRelease(redrive_shared->lock);
}

/* Be the pusher of this database; false when there is one, or none may be. */
bool
redrive_enter_pusher(void)
{
	RedriveDatabase *entry;
	bool		taken;

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	entry = redrive_find_database(MyDatabaseId);
	taken = entry == NULL || entry->pusher_pid != 0 || entry->kept_by != 0;
	if (!taken)
	{
		entry->pusher_pid = MyProcPid;
		entry->pusher_latch = MyLatch;
	}
	LWLockRelease(redrive_shared->lock);
	if (!taken)
		before_shmem_exit(leave_shmem, 0);
	return !taken;
}
