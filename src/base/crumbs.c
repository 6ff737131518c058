/*-------------------------------------------------------------------------
 *
 * crumbs.c
 *	  What each worker executes, in a file that survives a crash.
 *
 * Shared memory is wiped when the server restarts after a crash.  So each worker
 * notes what it executes in a memory-mapped file as well, by plain stores.  A
 * worker that the postmaster takes down because of another process stamps its
 * crumb in its SIGQUIT handler.  At the next start a crumb without a stamp names
 * what was executed when its process died.  The postmaster judges the crumbs then
 * and puts its verdicts into a second array of the file, where they stay until
 * the supervisor of the database has turned them into rows (sql/32_crash.sql).
 *
 * The file is in pg_stat_tmp, which neither pg_basebackup nor pg_rewind copies.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/file_perm.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/fd.h"
#include "storage/ipc.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/crumbs.h"
#include "base/shmem.h"

#define CRUMBS_FILE PG_STAT_TMP_DIR "/pg_redrive.crumbs"
#define CRUMBS_MAGIC 0x52644372
#define CRUMBS_VERSION 2
#define BOOT_ID_FILE "/proc/sys/kernel/random/boot_id"

typedef struct CrumbFile
{
	uint32		magic;
	uint32		version;
	uint32		slots;
	uint32		crumb_size;
	uint32		ended;			/* the postmaster saw all its children end */
	TimestampTz judged_at;		/* last */
	TimestampTz lost_at;		/* the file was made anew when the server
								 * started then, 0 = it was not */
	char		boot_id[40];	/* of the machine, empty = unknown */
	char		unused[48];
	RedriveCrumb crumbs[REDRIVE_MAX_SLOTS];
	RedriveCrumb verdicts[REDRIVE_MAX_SLOTS];
} CrumbFile;

StaticAssertDecl(sizeof(RedriveCrumb) == 64 && offsetof(CrumbFile, crumbs) == 128,
				 "crumbs are aligned to cache lines");

static RedriveCrumb nobodys;
volatile RedriveCrumb *redrive_crumb = &nobodys;

static CrumbFile *file = NULL;	/* mapped by the postmaster, inherited */
static struct sigaction previous_quit;

PG_FUNCTION_INFO_V1(redrive__crumbs);

/* SIGQUIT: it is not what we execute that crashed, then do as before. */
static void
stamp_and_quit(int signo, siginfo_t *info, void *context)
{
	/* one that the executed code sends itself is no excuse */
	if (info->si_pid == PostmasterPid)
		redrive_crumb->stamped = 1;
	if (previous_quit.sa_flags & SA_SIGINFO)
		previous_quit.sa_sigaction(signo, info, context);
	else
		previous_quit.sa_handler(signo);
}

/* The postmaster exits, all its children have ended before. */
static void
note_end(int code, Datum arg)
{
	if (file != NULL)
		file->ended = 1;
}

/* Fill in the id of this boot of the machine; empty when there is none. */
static void
read_boot_id(char *boot_id, Size size)
{
	int			fd = BasicOpenFile(BOOT_ID_FILE, O_RDONLY);
	ssize_t		length = 0;

	memset(boot_id, 0, size);
	if (fd < 0)
		return;
	length = read(fd, boot_id, size - 1);
	if (length < 0)
		memset(boot_id, 0, size);
	close(fd);
}

/*
 * Make the file anew, all of it written: a hole would be filled when a worker
 * stores into it, and kill that worker if the disk is full.
 */
static int
create_file(void)
{
	const char	zeros[sizeof(RedriveCrumb)] = {0};
	int			fd;
	bool		ok = true;

	(void) unlink(CRUMBS_FILE);
	fd = BasicOpenFile(CRUMBS_FILE, O_RDWR | O_CREAT | O_EXCL | PG_BINARY);
	if (fd < 0)
		return -1;
	for (Size done = 0; ok && done < sizeof(CrumbFile); done += sizeof(zeros))
		ok = write(fd, zeros, sizeof(zeros)) == sizeof(zeros);
	if (!ok)
	{
		int			save_errno = errno ? errno : ENOSPC;

		close(fd);
		(void) unlink(CRUMBS_FILE);
		errno = save_errno;
		return -1;
	}
	return fd;
}

/* Is it the file of an earlier server like this one? */
static bool
is_valid(void)
{
	return file->magic == CRUMBS_MAGIC && file->version == CRUMBS_VERSION &&
		file->slots == REDRIVE_MAX_SLOTS && file->crumb_size == sizeof(RedriveCrumb);
}

/*
 * Map the file, a new one if it is missing or not as it should be; returns
 * false when there is none to be had.  Never mapped over a restart: somebody may
 * have cut it off, and what is behind its end must not be touched.
 */
static bool
map_file(void)
{
	struct stat st;
	int			fd;

	if (file != NULL)
		munmap(file, sizeof(CrumbFile));
	file = NULL;
	fd = BasicOpenFile(CRUMBS_FILE, O_RDWR | PG_BINARY);
	if (fd >= 0 && (fstat(fd, &st) != 0 || st.st_size != sizeof(CrumbFile)))
	{
		close(fd);
		fd = -1;
	}
	if (fd < 0)
		fd = create_file();
	if (fd >= 0)
	{
		file = mmap(NULL, sizeof(CrumbFile), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (file == MAP_FAILED)
			file = NULL;
	}
	if (file == NULL)
		ereport(WARNING,
				(errcode_for_file_access(),
				 errmsg("could not create or map file \"%s\": %m", CRUMBS_FILE),
				 errdetail("An item that crashes the server will not be found."),
				 errhint("Mend the cause and restart the server.")));
	if (fd >= 0)
		close(fd);
	return file != NULL;
}

/* Keep a verdict; when the array is full the oldest one goes. */
static void
add_verdict(RedriveCrumb *crumb, CrumbKind kind, TimestampTz crashed_at)
{
	RedriveCrumb *place = &file->verdicts[0];

	for (int i = 0; i < REDRIVE_MAX_SLOTS && place->kind != CRUMB_NONE; i++)
		if (file->verdicts[i].kind == CRUMB_NONE || file->verdicts[i].crashed_at < place->crashed_at)
			place = &file->verdicts[i];
	*place = *crumb;
	place->kind = kind;
	place->crashed_at = crashed_at;
}

/*
 * Judge the crumbs of the server that ran before; called by the postmaster
 * whenever it makes shared memory, before any worker can run.
 *
 * If the postmaster saw its children end, a process without a stamp died by
 * itself, and what it executed is to blame.  If it was killed itself, we cannot
 * know what killed the others; and if the machine went down, nobody is to blame.
 */
void
redrive_judge_crumbs(void)
{
	static bool restarted = false;
	TimestampTz now = GetCurrentTimestamp();
	char		boot_id[sizeof(file->boot_id)];
	bool		valid;
	bool		witnessed;
	bool		same_boot;

	if (!IsPostmasterEnvironment || IsUnderPostmaster || IsBinaryUpgrade)
		return;
	if (!map_file())
		return;
	read_boot_id(boot_id, sizeof(boot_id));
	valid = is_valid();
	if (!valid)
		memset(file, 0, sizeof(CrumbFile));
	/* a crash is told from others by its time, even if the clock is set back */
	now = Max(now, file->judged_at + 1);
	witnessed = file->ended || restarted;
	same_boot = boot_id[0] != '\0' && memcmp(boot_id, file->boot_id, sizeof(boot_id)) == 0;

	for (int i = 0; i < REDRIVE_MAX_SLOTS; i++)
	{
		RedriveCrumb *crumb = &file->crumbs[i];
		bool		executes = crumb->kind != CRUMB_NONE && crumb->kind <= CRUMB_BUILD && crumb->id != 0;

		if (witnessed && crumb->stamped && crumb->chunk_id != 0)
			add_verdict(crumb, CRUMB_INNOCENT, now);
		else if (witnessed && !crumb->stamped && executes)
		{
			add_verdict(crumb, crumb->kind, now);
			ereport(LOG,
					(errmsg("a pg_redrive worker died while it executed code of users"),
					 crumb->kind == CRUMB_CALLBACK ?
					 errdetail("It was in callback %lld of database %u.", (long long) crumb->id, crumb->database) :
					 crumb->kind == CRUMB_BUILD ?
					 errdetail("It was in the build function for push %lld of database %u.", (long long) crumb->id, crumb->database) :
					 errdetail("It was in item %lld of batch %lld, chunk %lld, of database %u.", (long long) crumb->id,
							   (long long) crumb->batch_id, (long long) crumb->chunk_id, crumb->database)));
		}
		else if (!witnessed && same_boot && !crumb->stamped && executes && crumb->chunk_id != 0)
			add_verdict(crumb, crumb->kind == CRUMB_SEGMENT ? CRUMB_SEGMENT : CRUMB_SUSPECT, now);
		memset(crumb, 0, sizeof(RedriveCrumb));
	}

	file->magic = CRUMBS_MAGIC;
	file->version = CRUMBS_VERSION;
	file->slots = REDRIVE_MAX_SLOTS;
	file->crumb_size = sizeof(RedriveCrumb);
	file->ended = 0;
	file->judged_at = now;
	file->lost_at = valid ? 0 : now;
	memcpy(file->boot_id, boot_id, sizeof(boot_id));
	if (!restarted)
		on_proc_exit(note_end, (Datum) 0);
	restarted = true;
}

/* Make the crumb of a slot this process's own. */
void
redrive_attach_crumb(int slot, Oid database)
{
	static bool installed = false;
	struct sigaction action;

	if (file == NULL)
		return;
	memset(&file->crumbs[slot], 0, sizeof(RedriveCrumb));
	file->crumbs[slot].database = database;
	redrive_crumb = &file->crumbs[slot];
	if (!installed)
	{
		sigaction(SIGQUIT, NULL, &previous_quit);
		action = previous_quit;
		action.sa_flags |= SA_SIGINFO;
		action.sa_sigaction = stamp_and_quit;
		sigaction(SIGQUIT, &action, NULL);
	}
	installed = true;
}

/* Clear the crumb of a slot that is given up. */
void
redrive_detach_crumb(int slot)
{
	if (file == NULL)
		return;
	memset(&file->crumbs[slot], 0, sizeof(RedriveCrumb));
	if (redrive_crumb == &file->crumbs[slot])
		redrive_crumb = &nobodys;
}

/* Forget the verdicts of a database: they are in its tables, and committed. */
void
redrive_forget_crumbs(Oid database)
{
	if (file == NULL)
		return;
	for (int i = 0; i < REDRIVE_MAX_SLOTS; i++)
		if (file->verdicts[i].database == database)
			file->verdicts[i].kind = CRUMB_NONE;
}

/* SQL: _crumbs(): the verdicts of this database */
Datum
redrive__crumbs(PG_FUNCTION_ARGS)
{
	static const char *const kinds[] = {NULL, "item", "segment", "unlock", "callback", "build", "innocent", "suspect", "unknown"};
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	RedriveCrumb lost = {CRUMB_UNKNOWN};

	InitMaterializedSRF(fcinfo, 0);
	if (file == NULL)
		return (Datum) 0;
	lost.database = MyDatabaseId;
	lost.crashed_at = file->lost_at;
	for (int i = -1; i < REDRIVE_MAX_SLOTS; i++)
	{
		RedriveCrumb *crumb = i < 0 ? &lost : &file->verdicts[i];
		Datum		values[6];
		bool		nulls[6] = {false};

		if (crumb->kind == CRUMB_NONE || crumb->kind > CRUMB_UNKNOWN || crumb->database != MyDatabaseId ||
			crumb->crashed_at == 0)
			continue;
		values[0] = CStringGetTextDatum(kinds[crumb->kind]);
		values[1] = Int64GetDatum(crumb->batch_id);
		values[2] = Int64GetDatum(crumb->chunk_id);
		values[3] = Int64GetDatum(crumb->lease_token);
		values[4] = Int64GetDatum(crumb->id);
		values[5] = TimestampTzGetDatum(crumb->crashed_at);
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	return (Datum) 0;
}
